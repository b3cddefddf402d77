"""Patch maps of example images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from merging_parts import make_dense, tuned
from routed_models import open_with_model, stamp

from backdoorbench_moe.analysis.examples import collect_examples, make_examples
from backdoorbench_moe.gates import create_gate
from backdoorbench_moe.moe.merging import MergedModel, load_experts


def test_a_model_that_draws_its_experts_has_the_same_maps_again() -> None:
    base = make_dense()
    merged = MergedModel(base, 4, create_gate("sample-top1"))
    load_experts(merged, base.state_dict(), [tuned(base, seed) for seed in range(4)])
    opened = open_with_model(merged)
    opened.run.folder = SimpleNamespace(path=Path("run"))
    images = collect_examples([0, 1], opened.images)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(make_examples([opened], images, stamp).models[0])
    one, two = found
    for first, second in ((one.clean, two.clean), (one.triggered, two.triggered)):
        assert first.predicted == second.predicted and len(first.layers) == 2
        for a, b in zip(first.layers, second.layers, strict=True):
            assert torch.equal(a.selected, b.selected)
