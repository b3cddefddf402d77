"""Compare a run with its clean twin: the clean accuracy drop, and the effect of the trigger on a clean model."""

from __future__ import annotations

import torch

from backdoorbench_moe.engine.graph import PARENT
from backdoorbench_moe.engine.measuring.evaluate import Metrics, measure
from backdoorbench_moe.engine.poisoning.triggered import triggered_test
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.engine.setups.choice import make_setup
from backdoorbench_moe.engine.workplace import Workplace
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.ops.seeding import seeded
from backdoorbench_moe.records import Record, RunFolder

# Metrics of the twin under the run's trigger, by their name in the run's record.
TWIN_METRICS = {"twin_asr": "asr", "twin_target_rate": "target_rate"}
# The same for a poisoned expert, and for a mixture.
TWIN_EXPERT_METRICS = {**TWIN_METRICS, "twin_unsafe": "unsafe"}
TWIN_MIXTURE_METRICS = TWIN_EXPERT_METRICS | {
    f"twin_{name}": name for name in ("harm_share", "own_share", "clean_share")
}


def link_twin(run: Run, clean: Run, workplace: Workplace) -> Run:
    """Compare a run with its clean twin, and write the metrics and the name of the twin to the run's record.

    `cad` is the twin's BA minus the run's BA. `twin_asr` is the twin's ASR under the run's trigger, a baseline for the
    run's ASR. `twin_target_rate` is the twin's target rate without the trigger.

    Raises:
        RecordError: The two runs have different data.
    """
    record, name = run.record, clean.folder.path.name
    if clean.record.data["digest"] != record.data["digest"]:
        raise RecordError(f"clean twin {clean.folder.path}: was made from other data; use another --output")
    found = {"cad": _drop(clean, record)}
    # A twin without a model file can still be compared by its accuracy.
    if run.spec.attacked and not _is_linked(run, record, clean) and clean.folder.model_sha256 is not None:
        found |= _of_parent(run, clean) or _measure_twin(run, clean, workplace)
    if record.clean_twin != name or any(record.metrics.get(key) != value for key, value in found.items()):
        # Wait for any process that holds the lock: no process holds that of a finished run for long.
        with run.folder.lock(wait=lambda: None):
            record.metrics |= found
            record.clean_twin = name
            run.folder.write(record)
    return run


def _drop(clean: Run, record: Record) -> dict[str, float]:
    return {"value": clean.value("ba") - record.metrics["ba"]["value"], "n": record.metrics["ba"]["n"]}


def _is_linked(run: Run, record: Record, clean: Run) -> bool:
    """Whether a record, of a run or of its parent, already contains the comparison with the clean twin.

    A twin that was trained again, elsewhere or in another precision, has a different BA.
    """
    kept = record.metrics
    same = record.clean_twin == clean.folder.path.name and kept.get("cad") == _drop(clean, record)
    return same and all(key in kept for key in _twin_metrics(run))


def _of_parent(run: Run, clean: Run) -> Metrics | None:
    """The metrics of the twin in the record of a defended run's parent, which has the same trigger; None if missing."""
    for each in run.record.inputs:
        folder = RunFolder(run.folder.path.parent / each["run"])
        if each["role"] != PARENT or not folder.exists:
            continue
        parent = folder.read()
        same = all(
            parent.environment.get(k) == run.record.environment.get(k) for k in ("device", "precision")
        )
        if parent.digest == each["digest"] and same and _is_linked(run, parent, clean):
            return {name: parent.metrics[name] for name in _twin_metrics(run)}
    return None


def _twin_metrics(run: Run) -> dict[str, str]:
    if run.spec.mixture is None:
        return TWIN_METRICS
    found = TWIN_EXPERT_METRICS if run.spec.gate is None else TWIN_MIXTURE_METRICS
    # Texts have no target rate, since they have no trigger.
    return {name: metric for name, metric in found.items() if metric in run.record.metrics}


def _measure_twin(run: Run, clean: Run, workplace: Workplace) -> Metrics:
    """Measure the twin under the run's trigger, with the code that measured the run."""
    model = clean.model().to(workplace.device).to(memory_format=torch.channels_last)
    precision = workplace.precision
    # The same seed as when the run was measured, for a model that draws random numbers.
    with seeded(run.spec.seed, "measure"):
        if run.spec.mixture is None:
            images, stamper = workplace.images, run.stamper() if run.spec.trigger is not None else None
            triggered = triggered_test(images, run.attack(), stamper)
            metrics = measure(model, images.test, triggered, precision=precision)
        else:
            setup = make_setup(run.located_spec(), workplace.data)
            metrics, _ = setup.measure(model, precision=precision)
    return {name: metrics[metric] for name, metric in _twin_metrics(run).items()}
