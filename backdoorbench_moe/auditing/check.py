"""The interface of a check: what it needs, what it costs, and what it measures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, ClassVar, Literal, final

from backdoorbench_moe.auditing.subject import Subject
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.errors import BbmoeError
from backdoorbench_moe.moe.routed import RoutedModel
from backdoorbench_moe.moe.structure import WithExperts, WithFeatures

Need = Literal["images", "classes", "experts", "routing", "features", "tasks", "base"]
# With fewer classes there is no median to be below or above. Counted only where there are images.
FEWEST_CLASSES = 4


class NotTested(Exception):
    """Raised by a check that cannot say anything about a model; the message is the reason."""


@dataclass(frozen=True)
class Measured:
    """What a check measured.

    Attributes:
        score: Finite; higher is more suspicious.
        reason: A sentence in plain words that says what was found, whether or not it is suspicious.
        details: Further values for the record, as JSON has them.
    """

    score: float
    reason: str
    details: Mapping[str, Any] = field(default_factory=dict)


class Check(ABC):
    """One question about a model, such as whether an expert stands out among the others.

    Subclasses implement `measure`, and `cost` if images are passed through the model.

    Attributes:
        name: Its name, such as "gate-rows".
        title: What it looks at, in a few words.
        explains: What the score is, in a sentence.
        needs: What a subject must have.
        uses: Names of the checks of which it takes what they kept, or which it makes itself if they were not made.
        threshold: The threshold without a calibration: that of the defense's authors, or of a statistical test; None
            if there is none. Without a calibration such a check is measured, but does not judge.
        source: Where the threshold or the method comes from.
        version: To be raised when the same model would get another score.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    explains: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]] = ()
    uses: ClassVar[tuple[str, ...]] = ()
    threshold: ClassVar[float | None] = None
    source: ClassVar[str] = "ours"
    version: ClassVar[int] = 1

    @final
    def run(self, subject: Subject) -> Measured:
        """Measure a subject.

        Raises:
            NotTested: The subject lacks what the check needs, or the check cannot be applied to it.
        """
        for need in self.needs:
            if reason := lacks(subject, need):
                raise NotTested(reason)
        try:
            found = self.measure(subject)
        except NotTested:
            raise
        except BbmoeError as error:
            raise NotTested(str(error)) from error
        except Exception as error:
            # A model of unknown origin may raise anything; the other checks still say something.
            first = (str(error).splitlines() or [""])[0]
            raise NotTested(f"the model failed with {type(error).__name__}: {first}") from error
        if not isfinite(found.score):
            raise NotTested("the score is not a finite number")
        return found

    def cost(self, subject: Subject) -> Cost:
        """Return how many images pass the model; called for subjects that have what the check needs."""
        return Cost()

    @abstractmethod
    def measure(self, subject: Subject) -> Measured:
        """Measure a subject that has what the check needs.

        Raises:
            NotTested: The check cannot be applied to it.
        """


def lacks(subject: Subject, need: Need) -> str:
    """Return why a subject does not have what a check needs; "" if it does."""
    model, kind = subject.model, type(subject.model).__name__
    enough = subject.images is None or subject.num_classes >= FEWEST_CLASSES
    reasons: dict[Need, str] = {
        "images": "" if subject.images is not None else "no images were given (--images, images=)",
        "classes": "" if enough else f"with {subject.num_classes} classes, none can be an outlier",
        "experts": "" if isinstance(model, WithExperts) else f"{kind} has no experts",
        "routing": "" if isinstance(model, RoutedModel) else f"{kind} has no routing",
        "features": ""
        if isinstance(model, WithFeatures)
        else f"{kind} does not give the features before its head",
        "tasks": ""
        if len(subject.tasks) > 1
        else "no images of single tasks were given (tasks=; a mixture made here has them)",
        "base": "" if subject.base is not None else "no base was given to compare with (--base, base=)",
    }
    return reasons[need]
