"""Findings of a defense: about inputs, training samples, classes, experts or the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, get_args

from backdoorbench_moe.errors import PluginError
from backdoorbench_moe.plain import plain

if TYPE_CHECKING:
    from torch import Tensor

# Names in scores.npz that judgements about samples use.
TAKEN = ("scores", "suspicious")

About = Literal["input", "sample", "class", "expert", "model"]


@dataclass(frozen=True)
class Judgement:
    """One finding of a defense: scores, a threshold, and what is suspicious.

    Args:
        about: What is judged: an "input" (any image at test time), a "sample" (of the training set), a "class", an
            "expert", or the "model".
        reason: One sentence that states what the scores measure, and which scores are suspicious.
        scores: Scores by name, such as "moe/2" for an expert or "3" for a class; for samples, (N,) float, one for
            each image of the training set, higher for more suspicious ones; for inputs, None. They should be finite:
            NaN and infinity are recorded as null, and those of samples are refused.
        threshold: The score that separates suspicious from unsuspicious; None if no threshold was used.
        suspicious: Names of what is suspicious; for samples, (n,) int64 indices; for inputs, empty.
        details: Further values for the record: strings, numbers, lists and mappings. NumPy and PyTorch values are
            converted.
        judge: Function that scores inputs, given if and only if `about` is "input". It takes images (B, 3, H, W)
            uint8 and returns (B,) finite floats. Images with a score above `threshold` are rejected. The score of
            an image must not depend on the other images of the batch. The engine evaluates it after the defense has
            returned, on clean and triggered test images in shuffled batches.
        arrays: Tensors by name that are too large for the record, such as inverted triggers; they are stored in
            `scores.npz` in the run folder. The names "scores" and "suspicious" are reserved.

    Raises:
        PluginError: A field is missing, has an invalid value, or contradicts another one.
    """

    about: About
    reason: str
    scores: Mapping[str, float] | Tensor | None = None
    threshold: float | None = None
    suspicious: Sequence[str] | Tensor = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    judge: Callable[[Tensor], Tensor] | None = None
    arrays: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.about not in get_args(About):
            raise PluginError(f"judgement: about: expected one of {get_args(About)}, got {self.about!r}")
        if not isinstance(self.reason, str) or not self.reason:
            raise PluginError(f"judgement: reason: expected a sentence, got {self.reason!r}")
        if (self.about == "input") != (self.judge is not None):
            raise self._expected("judge", "a function for inputs, and none for anything else", self.judge)
        if self.threshold is not None and not _is_finite(self.threshold):
            raise PluginError(f"judgement: threshold: expected a finite number, got {self.threshold!r}")
        if self.judge is not None and self.threshold is None:
            raise PluginError("judgement about input: threshold: expected a finite number, got None")
        self._check_scores()
        self._check_suspicious()
        self._check_details()
        self._check_arrays()

    def _check_scores(self) -> None:
        if self.scores is None:
            return
        if self.about == "input":
            raise self._expected("scores", "none, since `judge` gives them", self.scores)
        if self.about == "sample":
            if not _is_vector(self.scores, floating=True):
                raise self._expected("scores", "a tensor (N,) of floats", self.scores)
        elif not isinstance(self.scores, Mapping) or not all(map(_is_score, self.scores.items())):
            raise self._expected("scores", "numbers by name", self.scores)

    def _check_suspicious(self) -> None:
        names = self.suspicious
        if _is_empty(names):
            return
        if self.about == "input":
            raise self._expected("suspicious", "none, since the filter decides for each input", names)
        if self.about == "sample":
            if not _is_vector(names, floating=False):
                raise self._expected("suspicious", "a tensor (n,) of int64 indices", names)
        elif not _are_names(names):
            raise self._expected("suspicious", "a list of names", names)

    def _check_details(self) -> None:
        if not isinstance(self.details, Mapping):
            raise self._expected("details", "values by name", self.details)
        object.__setattr__(self, "details", plain(self.details))
        try:
            json.dumps(self.details)
        except (TypeError, ValueError, RecursionError) as error:
            raise self._expected("details", f"values that JSON has ({error})", self.details) from error

    def _check_arrays(self) -> None:
        import torch

        if not isinstance(self.arrays, Mapping) or not all(
            isinstance(name, str) and name not in ("", *TAKEN) and isinstance(values, torch.Tensor)
            for name, values in self.arrays.items()
        ):
            raise self._expected("arrays", f"tensors by name, other than {' and '.join(TAKEN)}", self.arrays)

    def _expected(self, name: str, expected: str, got: object) -> PluginError:
        return PluginError(f"judgement about {self.about}: {name}: expected {expected}, got {got!r}")


def _is_score(item: tuple[object, Any]) -> bool:
    """Whether a name and its score can be written to a record."""
    name, score = item
    return isinstance(name, str) and type(plain(score)) in (int, float)


def _is_finite(value: Any) -> bool:
    """Whether a value is a finite number."""
    try:
        return isfinite(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def _is_empty(names: object) -> bool:
    """Whether names are an empty collection or a tensor without elements."""
    import torch

    if isinstance(names, torch.Tensor):
        return not names.numel()
    return isinstance(names, Collection) and not len(names)


def _are_names(names: object) -> bool:
    """Whether names are a collection of strings."""
    import torch

    if isinstance(names, str | torch.Tensor) or not isinstance(names, Collection):
        return False
    return all(isinstance(name, str) for name in names)


def _is_vector(values: object, *, floating: bool) -> bool:
    """Whether values are a tensor of one dimension, of floats or of int64."""
    import torch

    if not isinstance(values, torch.Tensor) or values.ndim != 1:
        return False
    return values.is_floating_point() if floating else values.dtype == torch.int64
