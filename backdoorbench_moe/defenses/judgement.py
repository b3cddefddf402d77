"""What a defense that judges found: about inputs, training samples, classes, experts or the model."""

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
    """One judgement of a defense.

    Args:
        about: What is judged: "input" (any image at test time), "sample" (of the training set), "class", "expert" or
            "model".
        reason: One sentence: how the scores were made, and what is suspicious for that reason.
        scores: Score by name, such as "moe/2" for an expert or "3" for a class; (N,) float for the N samples of the
            training set; None for inputs.
        threshold: The score at which something becomes suspicious; None if nothing was decided by a threshold.
        suspicious: Names of what is suspicious; (n,) int64 indices for samples.
        details: Plain values for the record that the other fields do not hold.
        judge: Of a judgement about inputs: (N, 3, H, W) uint8 images to (N,) finite floats. A score above
            `threshold` is suspicious, and such an image is rejected. The score of an image must not depend on the
            others beside it. The engine measures it after the defense has returned, on clean and triggered test
            images in one shuffled batch.

    Raises:
        PluginError: A field is missing or does not go with the others.
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
