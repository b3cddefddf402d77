"""Optional interfaces of models.

Any model, routed or not, may have a class attribute `tiny`: options that make it small. The conformance tests build
it with them. Where gates choose, they should lie far apart, so that no rounding decides.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class StartsFromFile(Protocol):
    """A model whose training may begin with weights from a file that one of its options names; optional.

    Building it must not need the file: a trained model is built again long after, to be given its own weights.
    """

    def load_start(self) -> None:
        """Load these weights, in place; nothing where no file is named. Raises ConfigError, naming the option.

        Called before a victim is trained from its first step, maybe more than once.
        """
