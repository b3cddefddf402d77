"""Repeated measurement of a run's model, to check the run's record; see `engine.measuring.consistency`."""

from __future__ import annotations

from backdoorbench_moe.analysis.marks import MarkedTest
from backdoorbench_moe.analysis.passes import PairedPass
from backdoorbench_moe.engine.measuring.consistency import check_same
from backdoorbench_moe.engine.measuring.evaluate import Metrics, measure, share
from backdoorbench_moe.engine.measuring.mixtures import MixturePass, mixture_pass, task_metrics
from backdoorbench_moe.engine.opening.opened_run import OpenedRun
from backdoorbench_moe.engine.poisoning.triggered import Triggered, triggered_test
from backdoorbench_moe.ops.seeding import seeded


def pass_mixture(opened: OpenedRun, model_of: OpenedRun, marked: MarkedTest | None) -> MixturePass:
    """Pass the images of a mixture's tasks and marked images through its model or through that of another run.

    Args:
        opened: The run of the mixture.
        model_of: The run whose model is used.
        marked: The marked images; None without a trigger.
    """
    assert opened.tasks is not None
    images, unmarked = (None, None) if marked is None else (marked.images, marked.unmarked)
    # The same draws, in the same order, as when the run was measured.
    with seeded(opened.run.spec.seed, "measure"):
        return mixture_pass(
            model_of.model, opened.tasks.tests(), images, unmarked, precision=opened.precision
        )


def check_record(
    opened: OpenedRun, marked: MarkedTest | None, routed: PairedPass | None, mixture: MixturePass | None
) -> None:
    """Check that a run's model reproduces the BA and ASR of its record.

    Args:
        opened: The run.
        marked: The marked images of the analysis; None without a trigger.
        routed: The pass of a routed model; None for a dense one.
        mixture: The pass of a mixture; None for any other run.

    Raises:
        RecordError: BA or ASR differs.
    """
    own = marked if marked is not None and marked.source is opened else None
    counted = _counted(opened, own)
    if mixture is not None:
        found = _measured_mixture(opened, mixture, counted)
    elif routed is not None:
        found = _measured_routed(opened, routed, counted, stamped=own is not None)
    else:
        with seeded(opened.run.spec.seed, "measure"):
            found = measure(
                opened.model, opened.test, counted, precision=opened.precision, plain=opened.images.test
            )
    check_same(opened.run, found, precision=opened.precision)


def _counted(opened: OpenedRun, own: MarkedTest | None) -> Triggered | None:
    """Return the images that the run's ASR is measured on; None if it was not attacked."""
    if not opened.run.spec.attacked:
        return None
    return triggered_test(opened.images, opened.run.attack(), None) if own is None else own.triggered


def _measured_mixture(opened: OpenedRun, found: MixturePass, counted: Triggered | None) -> Metrics:
    assert opened.tasks is not None
    metrics = {"ba": task_metrics(found, opened.tasks.tests(), None)["ba"]}
    if counted is not None:
        assert found.marked is not None
        metrics["asr"] = share(found.marked.predicted == counted.wanted)
    return metrics


def _measured_routed(
    opened: OpenedRun, found: PairedPass, counted: Triggered | None, *, stamped: bool
) -> Metrics:
    metrics = {"ba": share(found.clean.predicted == opened.images.test.labels.cpu())}
    if counted is not None:
        # Without a trigger the images that count are clean test images.
        passed = found.triggered if stamped else None
        predicted = passed.predicted if passed else found.clean.predicted[counted.places.cpu()]
        metrics["asr"] = share(predicted == counted.wanted.cpu())
    return metrics
