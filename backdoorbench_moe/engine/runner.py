"""Find finished runs on disk, or create them after the runs that they depend on.

Creating a run means training or defending a model, measuring it, and writing the run folder.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from backdoorbench_moe.config import PartSpec, RunSpec
from backdoorbench_moe.data.base import ImageSet
from backdoorbench_moe.data.text import TextSet
from backdoorbench_moe.engine.class_names import describe_poison, warn_of_numeric_names
from backdoorbench_moe.engine.graph import PARENT, NodeKind, kind_of, lineage, needs, reference
from backdoorbench_moe.engine.makers.base import Maker
from backdoorbench_moe.engine.makers.defend import DefenseMaker
from backdoorbench_moe.engine.makers.expert import ExpertMaker, PoisonedExpertMaker
from backdoorbench_moe.engine.makers.imported import ImportMaker
from backdoorbench_moe.engine.makers.inputs import check_lineage, check_parts
from backdoorbench_moe.engine.makers.merge import MergeMaker
from backdoorbench_moe.engine.makers.train import TrainMaker
from backdoorbench_moe.engine.memory import (
    machine_memory,
    memory_line,
    memory_needed,
    memory_warning,
    says_memory,
)
from backdoorbench_moe.engine.names import check_part_options
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.engine.run import (
    Run,
    check_data,
    check_finished,
    check_model,
    check_options,
    check_plugins,
    load_run,
)
from backdoorbench_moe.engine.twin import link_twin
from backdoorbench_moe.engine.workplace import Workplace
from backdoorbench_moe.errors import BbmoeWarning, RecordError
from backdoorbench_moe.records import RunFolder

__all__ = ["Run", "Runner", "load_run", "run_attack", "run_defense", "run_import"]


def run_attack(
    spec: RunSpec,
    *,
    output: Path | str = "runs",
    repeats: int = 1,
    twin: bool = True,
    observer: Observer | None = None,
) -> list[Run]:
    """Train and measure the model of a spec, once for each of several seeds.

    Finished runs in `output` are reused. Interrupted runs continue after their last completed epoch.

    Args:
        spec: The run with the first seed.
        output: Folder that contains the run folders.
        repeats: Number of seeds: `spec.seed`, `spec.seed` + 1, ...
        twin: Whether to compare each run with its clean twin, the same run without the attack, and create the twin if
            needed.
        observer: Receives progress.

    Returns:
        One finished run for each seed.

    Raises:
        BbmoeError: A setting is not valid, or the data, a plug-in or a run folder cannot be used.
    """
    runner = Runner(spec, output, observer)
    return [runner.attack(replace(spec, seed=spec.seed + n), twin=twin) for n in range(repeats)]


def run_import(spec: RunSpec, *, output: Path | str = "runs", observer: Observer | None = None) -> Run:
    """Import a model that was trained elsewhere, and measure it on clean test images.

    Args:
        spec: The spec of an imported model. Its option `model.weights` names the file.
        output: Folder that contains the run folders.
        observer: Receives progress.

    Raises:
        BbmoeError: A setting is not valid, or the file, the data or a run folder cannot be used.
    """
    assert spec.imported
    return Runner(spec, output, observer).finish(spec)


def run_defense(
    run: Run,
    defense: PartSpec,
    *,
    output: Path | str | None = None,
    data_root: str | None = None,
    device: str | None = None,
    observer: Observer | None = None,
) -> Run:
    """Defend the model of a finished run. The defended run gets a separate folder.

    Args:
        run: The run to defend.
        defense: The defense.
        output: Folder that will contain the folder of the defended run; None for the parent folder of `run`.
        data_root: Folder of the data; None for the one in the spec of `run`.
        device: Device to compute on; None for the one in the spec of `run`.
        observer: Receives progress.

    Returns:
        The defended run. It is compared with the clean twin of `run` if the twin is finished and next to `run`.

    Raises:
        BbmoeError: A setting is not valid, or the data, a plug-in or a run folder cannot be used.
    """
    spec = spec_to_defend(run, data_root=data_root, device=device)
    runner = Runner(spec, run.folder.path.parent if output is None else output, observer)
    return runner.defend(run, spec, defense)


def spec_to_defend(run: Run, *, data_root: str | None = None, device: str | None = None) -> RunSpec:
    """Return the spec of a finished run for defending it, with the current paths of its files.

    Args:
        run: The run to defend.
        data_root: Folder of the data; None for the one in the spec of `run`.
        device: Device to compute on; None for the one in the spec of `run`.

    Raises:
        RecordError: The run is not finished, or one of its files or plug-ins is missing or has changed.
    """
    check_finished(run)
    spec = run.located_spec()
    if data_root is not None:
        spec = spec.with_data(root=data_root)
    return replace(spec, device=device or spec.device)


MAKERS: Mapping[NodeKind, Callable[[RunSpec, Workplace], Maker]] = {
    NodeKind.TRAINED: TrainMaker,
    NodeKind.EXPERT: ExpertMaker,
    NodeKind.POISONED_EXPERT: PoisonedExpertMaker,
    NodeKind.MIXTURE: MergeMaker,
    NodeKind.DEFENDED: DefenseMaker,
    NodeKind.IMPORTED: ImportMaker,
}


class Runner:
    """Finds or creates runs on the same data, device and precision.

    Args:
        spec: Spec of any of these runs. Only its data set, device and precision are used, but the names of all its
            parts must exist.
        output: Folder that contains the run folders.
        observer: Receives progress.

    Raises:
        BbmoeError: A name is unknown, an option of the data set is not valid, or the device does not exist.
    """

    def __init__(self, spec: RunSpec, output: Path | str = "runs", observer: Observer | None = None) -> None:
        self.workplace = Workplace(spec, observer)
        self.output = Path(output)
        self._checked: set[str] = set()

    def say_memory(self, spec: RunSpec) -> str | None:
        """Estimate the memory of a run and of all runs that it needs; warn if the machine has less.

        Returns:
            The estimate in one line, which is also sent to the observer; None if the model provides no estimate, or
            the data are images.
        """
        if not says_memory(spec):
            return None
        check_part_options(spec)
        if not isinstance(data := self.workplace.data, TextSet):
            return None
        needed, available = memory_needed(spec, data), machine_memory(self.workplace.device)
        if (warning := memory_warning(needed, available)) is not None:
            warnings.warn(warning, BbmoeWarning, stacklevel=2)
        line = memory_line(needed, available)
        self.workplace.observer.on_message(line)
        return line

    def maker(self, spec: RunSpec) -> Maker:
        """Return the maker of a run, after it has built all parts and checked them against the data and each other.

        Raises:
            BbmoeError: A part cannot be built, or is incompatible with the data or another part.
        """
        spec = self.workplace.resolve(spec)
        maker = MAKERS[kind_of(spec)](spec, self.workplace)
        data = self.workplace.data
        if spec.attacked and not spec.defenses and isinstance(data, ImageSet):
            warn_of_numeric_names(spec.poison, data.classes)
            self.workplace.observer.on_message(describe_poison(spec.poison, data.classes))
        return maker

    def check(self, *specs: RunSpec) -> None:
        """Check runs, and all runs that they need, before anything is written.

        Runs that already exist, and those that were checked before, are skipped.

        Raises:
            BbmoeError: A part cannot be built, or is incompatible with the data or another part.
        """
        for needed in (each for spec in specs for each in lineage(self.workplace.resolve(spec))):
            if needed.digest not in self._checked and not RunFolder(self.output / needed.name).exists:
                MAKERS[kind_of(needed)](needed, self.workplace).check_weights()
            self._checked.add(needed.digest)

    def attack(self, spec: RunSpec, *, twin: bool = True) -> Run:
        """Return the finished run of a spec, as `finish` does. With `twin`, compare it with its clean twin."""
        spec = self.workplace.resolve(spec)
        if not RunFolder(self.output / spec.name).exists:
            self.say_memory(spec)
        run, clean = self.finish(spec), reference(spec)
        if clean is None or not twin:
            return run
        return link_twin(run, self.finish(clean, wait=True), self.workplace)

    def defend(self, run: Run, spec: RunSpec, defense: PartSpec, *, wait: bool = False) -> Run:
        """Return the finished run in which a run is defended, as `finish` does.

        Args:
            run: The run to defend, in any folder. The defended run is compared with the clean twin of `run` if the twin
                is finished and next to `run`.
            spec: The spec from `spec_to_defend`.
            defense: The defense.
            wait: Whether to wait if another process is working on the defended run; if False, this is an error.
        """
        defended = replace(spec, defenses=(*spec.defenses, defense))
        made = self.finish(defended, inputs={PARENT: run}, wait=wait)
        twin = RunFolder(run.folder.path.parent / run.record.clean_twin) if run.record.clean_twin else None
        if twin is None or not twin.exists or (record := twin.read()).status != "finished":
            return made
        return link_twin(made, Run(twin, record), self.workplace)

    def compare(self, run: Run) -> Run:
        """Compare a run with its clean twin if a finished one is in the output folder. No twin is trained."""
        clean = reference(run.spec)
        if clean is None or (found := self._find(RunFolder(self.output / clean.name), clean)) is None:
            return run
        return link_twin(run, found, self.workplace)

    def finish(self, spec: RunSpec, *, wait: bool = False, inputs: Mapping[str, Run] | None = None) -> Run:
        """Return the finished run of a spec. It is created if it does not exist, and continued if it was interrupted.

        Args:
            spec: The run.
            wait: Whether to wait if another process is working on the run; if False, this is an error.
            inputs: The runs that it is built from, by role (see `graph.needs`). If None, they are found or created in
                the same output folder.

        Raises:
            BbmoeError: A setting is not valid, or the data, a plug-in or a run folder cannot be used.
            StopRun: The observer stopped the run. The next call continues it.
        """
        spec = self.workplace.resolve(spec)
        observer, folder = self.workplace.observer, RunFolder(self.output / spec.name)
        if found := self._find(folder, spec):
            check_lineage(found)
            observer.on_found(str(folder.path))
            return found
        # Building the maker checks the settings before anything is written and before the inputs are created.
        maker = None if folder.exists else self.maker(spec)
        if inputs is None:
            if maker is not None:
                self.check(*needs(spec).values())
                if kind_of(spec) is NodeKind.MIXTURE:
                    check_parts(
                        maker.spec,
                        lambda needed: self._find(RunFolder(self.output / needed.name), needed),
                        maker.setup.data,
                    )
            inputs = {role: self.finish(needed, wait=True) for role, needed in needs(spec).items()}
        if maker is not None:
            maker.prepare(inputs)
        with folder.lock(wait=(lambda: observer.on_wait(str(folder.path))) if wait else None):
            if found := self._find(folder, spec):
                observer.on_found(str(folder.path))
                return found
            return (maker or self.maker(spec)).make(folder, inputs)

    def _find(self, folder: RunFolder, spec: RunSpec) -> Run | None:
        """Return the finished run in a folder, or None if there is none.

        The digest does not cover the content of the data, the plug-ins, the defaults of options, or the model file, so
        these are compared with the record.

        Raises:
            RecordError: The folder has the record of another run; or the data, the plug-ins, the defaults or the model
                file are not those of the record.
        """
        if not folder.exists:
            return None
        if (record := folder.read()).digest != spec.digest:
            raise RecordError(
                f"run folder {folder.path}: expected the run with the digest {spec.digest}, found that of "
                f"{record.digest}; was it renamed?"
            )
        if record.status != "finished":
            return None
        run = Run(folder, record)
        check_plugins(folder, record)
        check_options(run)
        check_model(run)
        if not self.workplace.is_unchanged(record):
            check_data(folder, record, self.workplace.data)
        # It is still there if the process was killed as soon as the run was finished.
        folder.drop_checkpoint()
        return run
