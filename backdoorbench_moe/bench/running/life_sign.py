"""The life sign that a run writes to its folder while a suite executes it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LIFE_SIGN = ".progress.json"
OLD_AFTER_SECONDS = 60.0


def read_life_sign(folder: Path) -> dict[str, Any] | None:
    """Read the progress of the run that is, or was, being executed in a folder; None if there is no life sign."""
    try:
        sign = json.loads((folder / LIFE_SIGN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return sign if isinstance(sign, dict) else None


def is_fresh(sign: Mapping[str, Any] | None) -> bool:
    """Whether a life sign is recent, so that the run is still being executed; a killed run leaves an old one."""
    return sign is not None and time.time() - sign.get("time", 0.0) <= OLD_AFTER_SECONDS
