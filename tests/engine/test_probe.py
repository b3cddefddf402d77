"""`--probe N`: its contents, that it does not change training, and that it survives interruptions."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from tiny import Tiny, tiny_spec

from backdoorbench_moe.engine.build import build_model
from backdoorbench_moe.engine.graph import clean_twin
from backdoorbench_moe.engine.inference import as_input
from backdoorbench_moe.engine.makers.probe import load_probe_record
from backdoorbench_moe.engine.poisoning.poison import stamp_images
from backdoorbench_moe.engine.progress.observer import Observer, StopRun
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.engine.runner import run_attack
from backdoorbench_moe.errors import ConfigError, RecordError
from backdoorbench_moe.records import RunFolder


class Stop(Observer):
    """Stops after an epoch."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_epoch(self, epoch: int, row: dict[str, float]) -> None:
        if epoch == self.after:
            raise StopRun


def attacked(folder, observer=None, **values) -> Run:
    [run] = run_attack(tiny_spec(**values), output=folder, twin=False, observer=observer)
    return run


def weights(run: Run) -> dict[str, torch.Tensor]:
    return run.folder.load_tensors()[0]


def test_it_changes_neither_weights_nor_metrics_nor_older_digests(tmp_path) -> None:
    plain, probed = attacked(tmp_path), attacked(tmp_path, probe=4)
    assert plain.folder.path != probed.folder.path
    ours, theirs = weights(probed), weights(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()
    assert probed.record.metrics == plain.record.metrics
    assert "probe" not in plain.spec.to_dict() and plain.spec.digest == tiny_spec(probe=0).digest
    assert load_probe_record(plain.folder) is None
    # All attacks share a clean twin, probed or not.
    assert clean_twin(probed.spec) == clean_twin(plain.spec)


def test_it_holds_what_the_model_does_before_training_and_at_the_end(tmp_path) -> None:
    run = attacked(tmp_path, probe=6)
    record = load_probe_record(run.folder)
    images = Tiny().load()
    assert record.layers == ("moe",) and record.clean.selected[0].shape == (3, 6, 4, 64)
    assert record.indices.tolist() == sorted(set(record.indices.tolist()))
    # Those that count for ASR: not of the target's class.
    assert (images.test.labels[record.indices] != 0).all()
    fresh = build_model(run.spec, {"num_classes": 3, "image_size": 32}).eval()
    clean = images.test.images[record.indices]
    for history, pictures in ((record.clean, clean), (record.triggered, stamp_images(clean, run.stamper()))):
        for model, step in ((fresh, 0), (run.model(), 2)):
            # The memory format of training: in another one, near ties may be decided differently.
            laid_out = model.to(memory_format=torch.channels_last)
            with torch.inference_mode():
                output = laid_out.forward_routed(as_input(pictures))
            assert torch.equal(history.selected[0][step], output.routing[0].selected)
            assert torch.equal(history.predicted[step], output.logits.argmax(1))
    assert not torch.equal(record.clean.selected[0][0], record.clean.selected[0][2])
    clean_run = attacked(tmp_path, probe=60, trigger=None, applicator=None, poison={"rate": 0})
    record = load_probe_record(clean_run.folder)
    assert record.triggered is None and record.indices.tolist() == list(range(60))


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_and_continued_run_has_the_same_file(tmp_path, after) -> None:
    values = {"probe": 5, "train": {"epochs": 3, "momentum": 0.9}}
    whole = attacked(tmp_path / "whole", **values)
    with pytest.raises(StopRun):
        attacked(tmp_path / "cut", Stop(after), **values)
    resumed = attacked(tmp_path / "cut", **values)
    files = [(run.folder.path / "probe.npz").read_bytes() for run in (whole, resumed)]
    assert files[0] == files[1]


def test_killed_between_the_probe_and_the_checkpoint(tmp_path) -> None:
    """The probe is written first, so it may be an epoch ahead of the checkpoint."""
    values = {"probe": 5, "train": {"epochs": 3}}
    whole = attacked(tmp_path / "whole", **values)
    with pytest.raises(StopRun):
        attacked(tmp_path / "cut", Stop(1), **values)
    folder = RunFolder(tmp_path / "cut" / whole.folder.path.name)
    ahead = {name: array.copy() for name, array in whole.folder.load_probe().items()}
    ahead["clean_0"][2:] = ~ahead["clean_0"][2:]
    folder.save_probe(ahead)
    resumed = attacked(tmp_path / "cut", **values)
    assert (resumed.folder.path / "probe.npz").read_bytes() == (whole.folder.path / "probe.npz").read_bytes()


@pytest.mark.slow
def test_a_checkpoint_whose_probe_is_gone_is_refused(tmp_path) -> None:
    values = {"probe": 5, "train": {"epochs": 3}}
    with pytest.raises(StopRun):
        attacked(tmp_path, Stop(2), **values)
    folder = RunFolder(tmp_path / tiny_spec(**values).name)
    file = folder.path / "probe.npz"
    short = {name: a[:2] if name[0] in "ct" else a for name, a in folder.load_probe().items()}
    for spoil in (file.unlink, lambda: folder.save_probe(short)):
        spoil()
        with pytest.raises(RecordError, match="probe does not match its checkpoint; delete the checkpoint"):
            attacked(tmp_path, **values)
    file.write_bytes(b"nothing")
    with pytest.raises(RecordError, match=r"probe .*probe\.npz: missing or damaged"):
        attacked(tmp_path, **values)
    shutil.rmtree(folder.path / "checkpoint")
    assert len(load_probe_record(attacked(tmp_path, **values).folder).clean.predicted) == 4


def test_invalid_probes_are_refused_before_anything_is_written(tmp_path) -> None:
    with pytest.raises(ConfigError, match="probe: expected a number of at least 0, got -1"):
        tiny_spec(probe=-1)
    with pytest.raises(ConfigError, match="probe: expected an integer, got 'some'"):
        tiny_spec(probe="some")
    with pytest.raises(
        ConfigError, match="probe: expected at most the 40 test images that count for ASR, got 41"
    ):
        attacked(tmp_path, probe=41)
    with pytest.raises(
        ConfigError, match="probe: expected 0, as the model 'wide_resnet' is not routed, got 2"
    ):
        attacked(tmp_path, probe=2, model={"name": "wide_resnet", "widen_factor": 1})
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_named(tmp_path) -> None:
    run = attacked(tmp_path, probe=3)
    good = run.folder.load_probe()
    for spoiled in (
        {name: array for name, array in good.items() if name != "clean_0"},
        {**good, "clean_0": good["clean_0"][:, :2]},
        {**good, "triggered_0": good["triggered_0"].astype(np.int64)},
    ):
        run.folder.save_probe(spoiled)
        with pytest.raises(RecordError, match=r"probe of run folder .*: damaged"):
            load_probe_record(run.folder)
