"""The interface of a check: its needs, its cost, and its measurement."""

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
# With fewer classes, no class can be an outlier. Only checked if there are images.
FEWEST_CLASSES = 4


class NotTested(Exception):
    """Raised by a check that cannot be applied to a model; the message is the reason."""


@dataclass(frozen=True)
class Measured:
    """Result of a check.

    Attributes:
        score: Finite; higher is more suspicious.
        reason: A sentence in plain words that states what was found, suspicious or not.
        details: Further JSON values for the record.
    """

    score: float
    reason: str
    details: Mapping[str, Any] = field(default_factory=dict)


class Check(ABC):
    """One question about a model, such as whether an expert stands out among the others.

    Subclasses implement `measure`, and `cost` if images are passed through the model.

    Attributes:
        name: Its name, such as "gate-rows".
        title: What it inspects, in a few words.
        explains: The meaning of the score.
        needs: What a subject must have.
        uses: Names of checks whose kept arrays it uses. It computes the arrays if these checks were not run.
        threshold: The threshold without a calibration, from the defense's authors or a statistical test. None without
            one; the check is then measured, but does not count for the verdict unless it is calibrated.
        source: Source of the threshold or the method.
        version: Must be increased when the same model would get another score.
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
            # A model of unknown origin may raise any error; the other checks may still work.
            first = (str(error).splitlines() or [""])[0]
            raise NotTested(f"the model failed with {type(error).__name__}: {first}") from error
        if not isfinite(found.score):
            raise NotTested("the score is not a finite number")
        return found

    def cost(self, subject: Subject) -> Cost:
        """Return how many images are passed through the model; called for subjects that meet the needs."""
        return Cost()

    @abstractmethod
    def measure(self, subject: Subject) -> Measured:
        """Measure a subject that meets the needs of the check.

        Raises:
            NotTested: The check cannot be applied to the subject.
        """


def lacks(subject: Subject, need: Need) -> str:
    """Return why a subject does not meet a need of a check; "" if it does."""
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
