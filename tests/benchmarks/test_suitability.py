"""The images that `benchmarks/suitability.py` compares."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch


def test_images_keep_their_shape_and_differ_as_their_names_say(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    images = torch.randint(
        0, 256, (500, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    found = importlib.import_module("suitability").kinds(images)
    assert {name: len(each) for name, each in found.items() if "test images" in name} == {
        f"{count} test images": count for count in (20, 100, 500)
    }
    spread = images[:100].float().std()
    assert torch.isclose(found["half the contrast"].float().std(), spread / 2, rtol=0.02)
    assert found["3x3 box blur"].float().std() < spread / 2
    assert all(each.dtype == torch.uint8 and each.shape[1:] == images.shape[1:] for each in found.values())
