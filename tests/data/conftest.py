"""Where the samples of the published sets lie, and writers of small files in the published layouts."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

SAMPLES = Path(os.environ.get("BBMOE_SAMPLES") or Path(__file__).parents[2] / ".." / "shared" / "data")


@pytest.fixture
def samples() -> Path:
    """The folder of real samples (cifar-10-batches-py and GTSRB); skips the test where there is none."""
    if not SAMPLES.is_dir():
        pytest.skip(f"no samples of the published sets at {SAMPLES}; set BBMOE_SAMPLES")
    return SAMPLES


@pytest.fixture
def rng() -> np.random.Generator:
    """Random pixels, the same at every run."""
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _own_data_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests away from the user's data."""
    monkeypatch.setenv("BBMOE_DATA", str(tmp_path_factory.mktemp("no_data")))
