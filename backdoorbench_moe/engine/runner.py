"""What one run does, step by step, and the run folder it leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from backdoorbench_moe.config import PartSpec, RunSpec
from backdoorbench_moe.data.base import ImageSet
from backdoorbench_moe.engine import parts
from backdoorbench_moe.engine.defend import DefenseJob, check_defenses
from backdoorbench_moe.engine.device import resolve_device, resolve_precision
from backdoorbench_moe.engine.job import Job, Run, check_data, check_plugins
from backdoorbench_moe.engine.names import check_names
from backdoorbench_moe.engine.observer import Observer
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.records import RunFolder

__all__ = ["Run", "Session", "link_twin", "load_run", "run_attack", "run_defense"]


def load_run(path: Path | str) -> Run:
    """Open a run folder. Raises RecordError if it is none, or its record is damaged."""
    folder = RunFolder(path)
    return Run(folder, folder.read())


def run_attack(
    spec: RunSpec,
    *,
    output: Path | str = "runs",
    repeats: int = 1,
    twin: bool = True,
    observer: Observer | None = None,
) -> list[Run]:
    """Do the whole job of a spec and return the runs: seeds `spec.seed`, `spec.seed` + 1, ... `repeats`.

    Each trains its victim, then (with `twin`) the clean twin, unless they lie finished in `output`; one
    that was interrupted goes on from its last epoch. Raises BbmoeError for anything the user can mend.
    """
    session = Session(spec, output, observer)
    return [session.attack(replace(spec, seed=spec.seed + n), twin=twin) for n in range(repeats)]


def run_defense(
    run: Run,
    defense: PartSpec,
    *,
    output: Path | str | None = None,
    data_root: str | None = None,
    device: str | None = None,
    observer: Observer | None = None,
) -> Run:
    """Defend the model of a finished run, and return the defended run, which lies in a folder of its own.

    output: folder of run folders; the one `run` lies in where None. data_root and device: other ones than the
    run was made with. CAD is computed where the clean twin lies beside the run; none is trained. Raises
    BbmoeError for anything the user can mend.
    """
    if run.record.status != "finished":
        raise RecordError(
            f"run folder {run.folder.path}: expected a finished run, its status is {run.record.status!r}"
        )
    spec, beside = run.spec, run.folder.path.parent
    if data_root is not None:
        spec = replace(
            spec, dataset=replace(spec.dataset, options={**spec.dataset.options, "root": data_root})
        )
    spec = replace(spec, defenses=(*spec.defenses, defense), device=device or spec.device)
    defended = Session(spec, beside if output is None else output, observer).finish(spec, parent=run)
    twin = RunFolder(beside / run.record.clean_twin) if run.record.clean_twin else None
    if twin is None or not twin.exists or (record := twin.read()).status != "finished":
        return defended
    return link_twin(defended, Run(twin, record))


class Session:
    """Runs on the same data, device and precision; the data are read once.

    spec: the first of them; only its data set, device and precision count here. output: folder of run
    folders. Raises BbmoeError if a name is unknown, or the device or the data's folder is not there.
    """

    def __init__(self, spec: RunSpec, output: Path | str = "runs", observer: Observer | None = None) -> None:
        check_names(spec)
        self.output, self.observer = Path(output), observer or Observer()
        self.dataset = parts.build_dataset(spec)
        self.device = resolve_device(spec.device)
        self.precision = resolve_precision(spec.precision, self.device)
        self._images: ImageSet | None = None

    @property
    def images(self) -> ImageSet:
        """The data, on the device; read at first use, as a finished run needs none."""
        if self._images is None:
            self.observer.on_message(f"reading {type(self.dataset).__name__}")
            self._images = self.dataset.load().to(self.device)
        return self._images

    def check(self, spec: RunSpec) -> None:
        """Build all parts of a run and check them against the data and each other; nothing is written.

        Raises BbmoeError for what would stop the run before its first step.
        """
        check_names(spec)
        check_defenses(spec, Job(spec, self).model, self.images)

    def attack(self, spec: RunSpec, *, twin: bool = True) -> Run:
        """The finished run of a spec, with CAD if the twin is wanted; see `run_attack`."""
        run = self.finish(spec)
        if spec.is_clean or not twin:
            return run
        return link_twin(run, self.finish(spec.clean_twin(), wait=True))

    def finish(self, spec: RunSpec, *, wait: bool = False, parent: Run | None = None) -> Run:
        """The finished run of a spec: from disk, or made now. wait: for another process that makes it.

        parent: the run that the last of the spec's defenses is applied to; where None it is finished first,
        in the same output. An observer that raises StopRun leaves the run "interrupted"; the next call goes
        on from its last epoch, or, if it is a defended one, from its parent.
        """
        folder = RunFolder(self.output / spec.name)
        if found := self._find(folder, spec):
            self.observer.on_found(str(folder.path))
            return found
        if spec.defenses and parent is None:
            self.check(spec)
            parent = self.finish(spec.parent(), wait=True)
        # Check all there is to check before writing.
        job = self._job(spec, parent) if not folder.exists else None
        if job is not None:
            job.start()
        with folder.lock(wait=(lambda: self.observer.on_wait(str(folder.path))) if wait else None):
            if found := self._find(folder, spec):
                self.observer.on_found(str(folder.path))
                return found
            return (job or self._job(spec, parent)).run(folder)

    def _job(self, spec: RunSpec, parent: Run | None) -> Job:
        return Job(spec, self) if parent is None else DefenseJob(spec, self, parent)

    def _find(self, folder: RunFolder, spec: RunSpec) -> Run | None:
        """The finished run in a folder. Raises RecordError if it was made from other data.

        A spec's digest leaves out where the data lies, so other data may have been there. They are read to
        see, unless the spec names the very place that the run was made from.
        """
        if not folder.exists or (record := folder.read()).status != "finished":
            return None
        check_plugins(folder, record)
        then, now = record.run_spec.dataset.options, spec.dataset.options
        named = now.get("root") is not None or not hasattr(self.dataset, "root")
        if not (named and then == now):
            check_data(folder, record, self.images)
        return Run(folder, record)


def link_twin(run: Run, clean: Run) -> Run:
    """Write CAD, and which twin it is from, into a run's record. Raises RecordError if their data differ."""
    if clean.record.data["digest"] != run.record.data["digest"]:
        raise RecordError(f"clean twin {clean.folder.path}: was made from other data; use another --output")
    cad = {"value": clean.value("ba") - run.value("ba"), "n": run.record.metrics["ba"]["n"]}
    if run.record.metrics.get("cad") != cad or run.record.clean_twin != clean.folder.path.name:
        # For who finds the run finished, or links it, too: nobody holds a finished run for long.
        with run.folder.lock(wait=lambda: None):
            run.record.metrics["cad"], run.record.clean_twin = cad, clean.folder.path.name
            run.folder.write(run.record)
    return run
