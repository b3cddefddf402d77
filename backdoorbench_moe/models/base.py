"""Optional protocols of models that the engine uses. Those about experts and features are in `moe.structure`.

Any model may also have a class attribute `tiny`: options that make it small, which the conformance tests build it with.
For a routed model they should make gates differ clearly, so that rounding does not decide which experts are selected.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable


class Origin(NamedTuple):
    """What is known of the file that a model starts from.

    Attributes:
        sha256: SHA-256 of the file, or of the files, in hexadecimal.
        backdoored: What its header says of itself: "true", "false", or "unknown" if it says nothing.
    """

    sha256: str
    backdoored: str


@runtime_checkable
class StartsFromFile(Protocol):
    """A model whose training can start from weights in a file that one of its options names.

    Building the model must not need the file: a trained model is built again later to load its own weights.
    """

    def load_start(self) -> Origin | None:
        """Load the weights from the file, in place; do nothing, and return None, if no file is named.

        It is called before the first training step, possibly more than once. The model file of the run will say
        "backdoored" if the file says so, and that it is not known unless the file says that it is not.

        Raises:
            ConfigError: If the file cannot be read or does not fit, naming the option.
        """
