"""Several defenses of one run: choice of the applicable ones, their costs, execution, and a table of the results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from backdoorbench_moe import defenses
from backdoorbench_moe.bench.running.defense_options import Options
from backdoorbench_moe.bench.running.estimate import defense_cost, judged_inputs, measure_speed, seconds_left
from backdoorbench_moe.bench.running.plan import Planned, read_plan
from backdoorbench_moe.bench.running.worker import record_failure
from backdoorbench_moe.bench.suites.paper import PaperTable
from backdoorbench_moe.bench.suites.suite import METRIC_COLUMNS, Cell, Layout, Suite
from backdoorbench_moe.bench.tables.layout import label
from backdoorbench_moe.bench.tables.record_metrics import with_recovery
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.bench.tables.tuning import PLAIN_TUNING, plain_tuning
from backdoorbench_moe.config import PartSpec, RunSpec
from backdoorbench_moe.data.text import TextSet
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.engine.graph import clean_twin
from backdoorbench_moe.engine.progress.observer import Observer, StopRun
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.engine.runner import Runner, spec_to_defend
from backdoorbench_moe.engine.setups.base import Setup
from backdoorbench_moe.engine.setups.choice import make_setup
from backdoorbench_moe.engine.setups.defenses import check_applicable, naming_defense
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.plugins import describe_error
from backdoorbench_moe.records import Record, RunFolder
from backdoorbench_moe.records.status import status_of

# Metrics of judgements about inputs, training images and classes; shown if any of the defenses has them.
JUDGEMENTS = (
    "auroc",
    "tpr",
    "fpr",
    "sample_auroc",
    "sample_tpr",
    "sample_fpr",
    "class_tpr",
    "class_fpr",
)
COLUMNS = ("ba", "asr", "ra", "ba_over_tuning", "asr_over_tuning", *JUDGEMENTS, "seconds")


@dataclass(frozen=True)
class Defended:
    """A defended run, finished or not.

    Attributes:
        spec: Its spec.
        cost: The cost of the defense; None if unknown.
    """

    spec: RunSpec
    cost: Cost | None

    @property
    def part(self) -> PartSpec:
        """The defense and its options."""
        return self.spec.defenses[-1]


@dataclass(frozen=True)
class DefensePlan:
    """Defenses that are applied to a run, each separately.

    Attributes:
        parent: The run.
        spec: Its spec, on the device in use.
        runner: Finds or executes the defended runs.
        setup: Model and data of the run.
        runs: The defended runs by increasing cost, followed by those of unknown cost.
        refused: Why a defense, or plain tuning beside one, cannot be applied, by name.
    """

    parent: Run
    spec: RunSpec
    runner: Runner
    setup: Setup
    runs: tuple[Defended, ...]
    refused: Mapping[str, str]

    def read(self) -> list[Planned]:
        """Read the progress of the defended runs from their folders."""
        return read_plan([each.spec for each in self.runs], self.runner.output)

    def estimate(self) -> list[tuple[Planned, float | None]]:
        """Return the runs with their remaining seconds, estimated from a short measurement of the model's speed.

        The seconds are None for a defense of unknown cost.
        """
        planned, images = self.read(), self.setup.data
        if all(run.status == "finished" for run in planned):
            return [(run, 0.0) for run in planned]
        speed = measure_speed(self.spec, images)
        return [(run, seconds_left(run, speed, images, self.setup.model)) for run in planned]

    def make(self) -> Iterator[tuple[Defended, str | None]]:
        """Execute the defended runs that are not finished.

        Yields:
            Each run, with the error if it failed. A failed run is recorded and does not stop the others.

        Raises:
            StopRun: The observer stopped the run.
        """
        for each in self.runs:
            try:
                self.runner.defend(self.parent, self.spec, each.part, wait=True)
            except (KeyboardInterrupt, StopRun):
                raise
            except Exception as error:
                # As in `plan_defenses`.
                message = _reason(each.part.name, error)
                record_failure(RunFolder(self.runner.output / each.spec.name), each.spec, message)
                yield each, message
            else:
                yield each, None

    def results(self) -> ResultSet:
        """Read the run and all its defended runs, as one table with a row for each."""
        found = {self.spec.digest: self.parent.record}
        twin = clean_twin(self.spec)
        for spec, output in [
            (twin, self.parent.folder.path.parent),
            *((each.spec, self.runner.output) for each in self.runs),
        ]:
            if (folder := RunFolder(output / spec.name)).exists:
                record = folder.read()
                found[spec.digest] = replace(record, status=status_of(folder, record))
        found[self.spec.digest] = with_recovery(self.parent.record, found.values())
        return ResultSet(_suite(self, found), found, PaperTable())


def plan_defenses(
    parent: Run,
    names: Sequence[str],
    options: Options | None = None,
    *,
    output: Path | str | None = None,
    data_root: str | None = None,
    device: str | None = None,
    observer: Observer | None = None,
) -> DefensePlan:
    """Choose the defenses that can be applied to a run, and sort them by cost.

    If a defense trains the model, plain tuning is added (for images only), as the clean images alone account for part
    of the effect.

    Args:
        parent: The finished run to defend.
        names: Names of defenses.
        options: Options by the name of the defense.
        output: Folder of run folders; None for the one that contains `parent`.
        data_root: Folder of the data; None for the one in the spec of `parent`.
        device: Device to compute on; None for the one in the spec of `parent`.
        observer: Receives progress.

    Raises:
        BbmoeError: A name or an option is invalid, no defense can be applied, or the run, data or device cannot be
            used.
    """
    spec = spec_to_defend(parent, data_root=data_root, device=device)
    runner = Runner(spec, parent.folder.path.parent if output is None else output, observer)
    spec = runner.workplace.resolve(spec)
    chosen = _parts(names, options or {})
    setup = make_setup(spec, runner.workplace.data)
    runs: dict[str, Defended] = {}
    refused: dict[str, str] = {}
    for part in chosen:
        defended = replace(spec, defenses=(*spec.defenses, part))
        try:
            run = _applied(defended, spec, setup)
        except Exception as error:
            # Catch any error, including those of plug-ins: the other defenses must still be evaluated.
            refused[part.name] = _reason(part.name, error)
            continue
        runs[defended.digest] = run
        tuned = None if isinstance(setup.data, TextSet) else plain_tuning(defended)
        if part.name != PLAIN_TUNING and tuned is not None and run.cost is not None and run.cost.trained:
            try:
                runs.setdefault(tuned.digest, _applied(tuned, spec, setup))
            except ConfigError as error:
                # A defense that holds no clean images may be applicable where 5% of the images are too few to tune on.
                refused[f"{PLAIN_TUNING} beside {part.name}"] = _reason(PLAIN_TUNING, error)
    if not runs:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ConfigError(f"--defense: cannot be applied to {parent.folder.path.name}: {reasons}")
    judged = judged_inputs(spec, setup.data)
    ordered = sorted(runs.values(), key=lambda run: _rank(run, judged))
    return DefensePlan(parent, spec, runner, setup, tuple(ordered), refused)


def _parts(names: Sequence[str], options: Options) -> list[PartSpec]:
    """Return the defenses by name, each once, with checked options."""
    wanted = dict.fromkeys(names)
    for name in wanted:
        defenses.registry.check_name(name)
    for name, given in options.items():
        if name not in wanted:
            raise UnknownNameError("--set: defense", name, wanted)
        # An option that the defense rejects is the user's mistake; a defense that does not fit the model is not.
        with naming_defense(name):
            defenses.registry.create(name, given)
    return [PartSpec(name, dict(options.get(name, {}))) for name in wanted]


def _applied(defended: RunSpec, spec: RunSpec, setup: Setup) -> Defended:
    """Return a defended run and its cost. Raises BbmoeError if the defense cannot be applied to the run."""
    part = defended.defenses[-1]
    defense = defenses.registry.create(part.name, part.options)
    check_applicable(defense, setup)
    return Defended(defended, defense_cost(defended, setup.data, setup.model))


def _reason(name: str, error: Exception) -> str:
    """Return the description of an error (see `plugins.describe_error`) without the name of the defense."""
    return describe_error(error).removeprefix(f"defense {name!r}: ")


def _rank(run: Defended, judged: int) -> tuple[bool, float, str]:
    """Return the sort key of a defense in the order of costs."""
    return run.cost is None, 0.0 if run.cost is None else run.cost.forward(judged), run.spec.name


def _describe(spec: RunSpec) -> str:
    """Return model, data and attack in one line."""
    where = f"{spec.model.name} on {spec.dataset.name}"
    if spec.attack is None:
        return f"{where}, clean"
    if spec.trigger is None or spec.applicator is None:
        return f"{where}, {spec.attack.name}"
    poisoned = f", {label('poison.rate', spec.poison.rate)} poisoned" if spec.poison.rate else ""
    return f"{where}, {spec.trigger.name} by {spec.applicator.name}{poisoned}"


def _suite(plan: DefensePlan, found: Mapping[str, Record]) -> Suite:
    """Return the run and its defended runs as a suite with one table of the metrics that any of them has."""
    cells = (Cell({}, plan.spec), *(Cell({}, each.spec) for each in plan.runs))
    measured = {key for record in found.values() for key in record.metrics}
    absent = {"asr", "ra", "asr_over_tuning"} if not plan.spec.attacked else set()
    if plan.parent.record.is_text:
        absent |= {"ba_over_tuning", "asr_over_tuning"}
    absent |= {*JUDGEMENTS} - measured
    # In mixtures, the safe answer to a marked image may differ from its true class.
    columns = ("unsafe" if key == "ra" and plan.spec.mixture is not None else key for key in COLUMNS)
    metrics = tuple(key for key in columns if key not in absent)
    title = f"Defenses of {plan.parent.folder.path.name}"
    layout = Layout(_describe(plan.spec), ("defenses",), METRIC_COLUMNS, metrics)
    return Suite(
        name=plan.parent.folder.path.name,
        title=title,
        version=None,
        scale=None,
        note="",
        repeats=1,
        cells=cells,
        tables=(layout,),
    )
