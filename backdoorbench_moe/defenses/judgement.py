"""Findings of a defense: about inputs, training samples, classes, experts or the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, get_args

from backdoorbench_moe.errors import PluginError

if TYPE_CHECKING:
    from torch import Tensor

About = Literal["input", "sample", "class", "expert", "model"]


@dataclass(frozen=True)
class Judgement:
    """One finding of a defense: scores, a threshold, and what is suspicious.

    Args:
        about: What is judged: an "input" (any image at test time), a "sample" (of the training set), a "class", an
            "expert", or the "model".
        reason: One sentence that says what the scores measure, and which scores are suspicious.
        scores: Scores by name, such as "moe/2" for an expert or "3" for a class; for samples, (N,) float, one for
            each image of the training set; for inputs, None.
        threshold: The score that separates suspicious from unsuspicious; None if no threshold was used.
        suspicious: Names of what is suspicious; for samples, (n,) int64 indices.
        details: Further plain values for the record.
        judge: Function that scores inputs, given if and only if `about` is "input". It takes images (B, 3, H, W)
            uint8 and returns (B,) finite floats. Images with a score above `threshold` are rejected. The score of
            an image must not depend on the other images of the batch. The engine evaluates it after the defense has
            returned, on clean and triggered test images in shuffled batches.

    Raises:
        PluginError: A field is missing or contradicts another one.
    """

    about: About
    reason: str
    scores: Mapping[str, float] | Tensor | None = None
    threshold: float | None = None
    suspicious: Sequence[str] | Tensor = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    judge: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.about not in get_args(About):
            raise PluginError(f"judgement: about: expected one of {get_args(About)}, got {self.about!r}")
        if not isinstance(self.reason, str) or not self.reason:
            raise PluginError(f"judgement: reason: expected a sentence, got {self.reason!r}")
        if (self.about == "input") != (self.judge is not None):
            raise PluginError(
                f"judgement about {self.about}: judge: expected a function for inputs, and none for anything else, "
                f"got {self.judge!r}"
            )
        if self.threshold is not None and not isfinite(self.threshold):
            raise PluginError(f"judgement: threshold: expected a finite number, got {self.threshold}")
        if self.judge is not None and self.threshold is None:
            raise PluginError("judgement about input: threshold: expected a finite number, got None")
