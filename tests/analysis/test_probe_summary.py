"""The summary of a probe, against sets of patches in plain Python."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch
from mixture_runs import TRAINING, mixture_spec
from tiny import tiny_spec

from backdoorbench_moe.analysis.probe_summary import summarize_probe
from backdoorbench_moe.engine.makers.probe import load_probe_record
from backdoorbench_moe.engine.opening.opened_run import open_run
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.engine.runner import run_attack
from backdoorbench_moe.errors import RecordError


def attacked(folder, **values) -> Run:
    return run_attack(tiny_spec(train={"epochs": 3}, **values), output=folder, twin=False)[0]


def sets(selected: torch.Tensor) -> list:
    """Convert (T, N, E, P) bool to sets of patches, indexed by [step][image][expert]."""
    return [[[set(row.nonzero().flatten().tolist()) for row in image] for image in step] for step in selected]


def test_numbers_are_those_of_sets(tmp_path) -> None:
    run = attacked(tmp_path, probe=4)
    opened = open_run(run)
    found, record = summarize_probe(opened, opened.routed), load_probe_record(run.folder)
    clean, stamped = sets(record.clean.selected[0]), sets(record.triggered.selected[0])
    [layer] = found.layers
    for history, got in ((clean, layer.settled), (stamped, layer.settled_triggered)):
        for t, step in enumerate(history):
            for e in range(4):
                values = [len(a[e] & b[e]) / len(a[e] | b[e]) for a, b in zip(step, history[-1], strict=True)]
                assert got[t, e].item() == pytest.approx(fmean(values))
    for t in range(4):
        shares = [
            len(clean[t][n][e] ^ stamped[t][n][e]) / (len(clean[t][n][e]) + len(stamped[t][n][e]))
            for n in range(4)
            for e in range(4)
        ]
        assert layer.changed[t].item() == pytest.approx(fmean(shares))
        # The 4x4 square lies in the first patch and nowhere else.
        captured = [any(0 in stamped[t][n][e] for e in range(4)) for n in range(4)]
        assert layer.captured[t].item() == fmean(captured)
        assert found.fooled[t].item() == fmean((record.triggered.predicted[t] == 0).tolist())
        true = opened.images.test.labels[record.indices]
        assert found.right[t].item() == fmean((record.clean.predicted[t] == true).tolist())
    assert found.epochs == found.shown == (0, 1, 2, 3)
    assert torch.equal(layer.maps.flatten(2), record.clean.selected[0][:, 0])
    assert torch.equal(layer.maps_triggered.flatten(2), record.triggered.selected[0][:, 0])
    assert torch.equal(found.clean[0], opened.images.test.images[record.indices[0]])
    assert [opened.images.classes.index(name) for name in found.labels] == true.tolist()


def test_a_clean_run_and_one_without_a_probe(tmp_path) -> None:
    clean = open_run(
        attacked(tmp_path, probe=3, trigger=None, applicator=None, poison={"rate": 0, "target": 0})
    )
    found = summarize_probe(clean, clean.routed)
    assert found.fooled is None and found.triggered is None and found.layers[0].changed is None
    without = open_run(attacked(tmp_path))
    assert summarize_probe(without, without.routed) is None


@pytest.mark.slow
def test_a_mixture_is_probed_while_its_gates_are_trained_or_set(tmp_path, tiny) -> None:
    """Its gates have fewer epochs than its base, or none. A policy without an attack fools nobody."""
    benign = {"attack": None, "mixture": {"experts": 2, "expert_train": TRAINING, "gate_train": TRAINING}}
    for number, values in enumerate(({"gate": {"name": "hidden"}}, benign)):
        [run] = run_attack(mixture_spec(probe=2, **values), output=tmp_path / str(number), twin=False)
        assert run.spec.train.epochs == 2
        opened = open_run(run)
        found = summarize_probe(opened, opened.routed)
        assert found.epochs == (0, 1) and found.triggered is not None
        assert (found.fooled is None) == (not run.spec.attacked)
        assert found.layers[0].captured is not None


def test_a_probe_of_another_run_is_refused(tmp_path) -> None:
    run = attacked(tmp_path, probe=3)
    opened = open_run(run)
    good = run.folder.load_probe()
    short = {name: array[:3] if name[0] in "ct" else array for name, array in good.items()}
    strange = {**good, "indices": good["indices"] + 1000}
    for spoiled in (short, strange):
        run.folder.save_probe(spoiled)
        with pytest.raises(RecordError, match=r"probe of run folder .*: does not fit the run"):
            summarize_probe(opened, opened.routed)
