"""The order of jobs: a run is handed out when those that it needs are made."""

from __future__ import annotations

from mixture_suites import mixture_suite

from backdoorbench_moe.bench.running.engines.agenda import Agenda
from backdoorbench_moe.bench.running.worker import Job, Outcome
from backdoorbench_moe.bench.suites.suite import order
from backdoorbench_moe.engine.graph import NodeKind, kind_of, needs
from backdoorbench_moe.records import RunFolder


def agenda_of(tmp_path, **values) -> tuple[Agenda, list[Job]]:
    jobs = [Job(spec.to_dict(), str(tmp_path)) for spec in order(mixture_suite(**values))]
    return Agenda(jobs), jobs


def drain(agenda: Agenda) -> list[Job]:
    """All jobs that can be handed out now."""
    return list(iter(agenda.take, None))


def end(agenda: Agenda, job: Job, status: str) -> list[Outcome]:
    return list(agenda.note(job, Outcome(job.run_spec.name, status)))


def test_with_any_number_of_workers_a_run_waits_for_what_it_is_made_from(tmp_path) -> None:
    agenda, jobs = agenda_of(tmp_path)
    made: set[str] = set()
    rounds = []
    while len(agenda):
        batch = drain(agenda)
        assert batch, "no job is ready and none is being made"
        for job in batch:
            assert {needed.digest for needed in needs(job.run_spec).values()} <= made
        for job in batch:
            made.add(job.run_spec.digest)
            assert len(end(agenda, job, "finished")) == 1
        rounds.append({kind_of(job.run_spec) for job in batch})
    assert len(made) == len(jobs)
    assert rounds == [
        {NodeKind.TRAINED},
        {NodeKind.EXPERT},
        {NodeKind.POISONED_EXPERT, NodeKind.MIXTURE},
        {NodeKind.MIXTURE},
    ]


def test_what_a_failed_run_is_needed_for_fails_once_and_says_why(tmp_path) -> None:
    agenda, jobs = agenda_of(tmp_path)
    [base] = drain(agenda)
    outcomes = end(agenda, base, "failed")
    assert len(outcomes) == len(jobs) == len({outcome.name for outcome in outcomes})
    assert {outcome.status for outcome in outcomes} == {"failed"}
    assert not len(agenda) and agenda.take() is None
    names = [spec.run_spec.name for spec in jobs if kind_of(spec.run_spec) is NodeKind.EXPERT]
    for name in names:
        assert RunFolder(tmp_path / name).read().error == f"needs {base.run_spec.name}, which failed"


def test_a_failed_attack_leaves_the_benign_mixtures(tmp_path) -> None:
    agenda, _ = agenda_of(tmp_path)
    for _ in range(2):
        for job in drain(agenda):
            end(agenda, job, "finished")
    batch = drain(agenda)
    [moevil] = [
        j for j in batch if kind_of(j.run_spec) is NodeKind.POISONED_EXPERT and "moevil" in j.run_spec.name
    ]
    lost = end(agenda, moevil, "failed")
    assert len(lost) == 1 + 2  # And the mixtures of both gates.
    for job in batch:
        if job is not moevil:
            end(agenda, job, "finished")
    assert len(drain(agenda)) == 2  # Those of the control.


def test_what_an_interrupted_run_is_needed_for_is_left_to_the_next_call(tmp_path) -> None:
    agenda, jobs = agenda_of(tmp_path)
    [base] = drain(agenda)
    first, *others = end(agenda, base, "interrupted")
    assert first.status == "interrupted"
    assert [outcome.status for outcome in others] == ["waiting"] * (len(jobs) - 1)
    assert not list(tmp_path.iterdir())


def test_what_is_finished_already_is_not_waited_for_and_a_held_job_comes_last(tmp_path) -> None:
    _, jobs = agenda_of(tmp_path)
    agenda = Agenda([job for job in jobs if kind_of(job.run_spec) is NodeKind.EXPERT])
    first = agenda.take()
    assert first is not None
    agenda.put_back(first)
    assert agenda.has_ready
    assert drain(agenda)[-1] is first
