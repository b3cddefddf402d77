"""The files that the benchmark of more images than memory writes."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from backdoorbench_moe.data import create_dataset

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "more_than_memory.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("more_than_memory_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DISTINCT", 20)
    monkeypatch.setattr(module, "TEST_IMAGES", 10)
    return module


def test_links_are_images_of_their_class(script, tmp_path) -> None:
    script.write_files(tmp_path / "files", 50, 16)
    images = create_dataset("folder", root=str(tmp_path / "files"), image_size=16).load()
    assert images.train.labels.bincount().tolist() == [5] * 10 and len(images.test) == 10
    distinct = images.train.images.flatten(1).unique(dim=0)
    assert len(distinct) == 20
    inodes = {path.stat().st_ino for path in (tmp_path / "files" / "train").rglob("*.jpg")}
    assert len(inodes) == 20


def test_fewer_images_where_the_disk_has_no_space(script, tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert script.possible(tmp_path, 200_000, 224) == int(0.8e9 / 150_528)
    assert script.possible(tmp_path, 100, 224) == 100
