"""Optional protocols of models that the engine uses. Those about experts and features are in `moe.structure`.

Any model may also have a class attribute `tiny`: options that make it small, which the conformance tests build it with.
For a routed model they should make gates differ clearly, so that rounding does not decide which experts are selected.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class StartsFromFile(Protocol):
    """A model whose training can start from weights in a file that one of its options names.

    Building the model must not need the file: a trained model is built again later to load its own weights.
    """

    def load_start(self) -> None:
        """Load the weights from the file, in place; do nothing if no file is named.

        It is called before the first training step, possibly more than once.

        Raises:
            ConfigError: If the file cannot be read or does not fit, naming the option.
        """
