"""The weight file that training starts from, or that a model is imported from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from backdoorbench_moe import models
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.engine.files import named_files, sha256_of
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.engine.weights.fitting import fit_weights
from backdoorbench_moe.engine.weights.reading import check_weights, read_weights
from backdoorbench_moe.errors import BbmoeWarning, RecordError
from backdoorbench_moe.paths import expand

# Key of the file in a spec.
KEY = "model.weights"


@dataclass(frozen=True)
class Start:
    """The initial weights of a model, for the record.

    Attributes:
        sha256: SHA-256 of the file.
        backdoored: Value in the header of the file: "true", "false" or "unknown"; see `provenance.backdoored`.
        notes: How the weights were read and changed, each note as one sentence.
    """

    sha256: str
    backdoored: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the values for a record."""
        return {**asdict(self), "notes": list(self.notes)}


def check_start(spec: RunSpec) -> None:
    """Check that the file in the model's option `weights` may contain weights, without reading tensors.

    If the spec has the hash of a file that is now missing, nothing is checked: an interrupted run continues without it.

    Raises:
        RecordError: The file is missing, has another format, or its header is damaged.
    """
    chosen = models.registry.common(spec.model.name, spec.model.options)
    if chosen.weights is None or (KEY in spec.files and KEY not in dict(named_files(spec))):
        return
    check_weights(expand(chosen.weights, KEY))


def load_start(spec: RunSpec, model: nn.Module, observer: Observer) -> Start | None:
    """Load the file in the model's option `weights` into a model, and send notes on it to the observer.

    Args:
        spec: The run. If it imports the model, the head must match.
        model: The model of the run, which is changed in place.
        observer: Receives the notes.

    Returns:
        The values for the record; None if the option is not set.

    Raises:
        RecordError: The file cannot be read, does not match the model, or does not have the hash in the spec.
    """
    chosen = models.registry.common(spec.model.name, spec.model.options)
    if chosen.weights is None:
        return None
    file = expand(chosen.weights, KEY)
    weights = read_weights(file, chosen.weights_key)
    notes = fit_weights(model, weights, head="keep" if spec.imported else chosen.head)
    # Weights fit a convolution with another stride as well, but the model would be another one.
    doubt = getattr(model, "stem_doubt", "")
    sha256 = sha256_of(file)
    if spec.files.get(KEY, sha256) != sha256:
        raise RecordError(f"{KEY}: {file} has changed while it was read")
    for note in notes:
        observer.on_message(f"{file.name}: {note}")
    if doubt:
        # One place (`stacklevel=1`), so that a check before the run does not repeat it.
        warnings.warn(doubt, BbmoeWarning, stacklevel=1)
        notes = (*notes, doubt)
    return Start(sha256, _said(weights.metadata, imported=spec.imported), notes)


def _said(metadata: Mapping[str, str], *, imported: bool) -> str:
    """What the header of a file says about a backdoor: "true", "false" or "unknown".

    Anyone can write "false" into a header, so it does not make an imported model a clean one.
    """
    said = metadata.get("backdoored")
    return said if said == "true" or (said == "false" and not imported) else "unknown"
