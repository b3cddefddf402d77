"""Optional protocols of models that the engine uses. Those about experts and features are in `moe.structure`.

Any model may also have a class attribute `tiny`: options that make it small, which the conformance tests build it with.
For a routed model they should make gates differ clearly, so that rounding does not decide which experts are selected.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor


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


@runtime_checkable
class ReadsCheckpoints(Protocol):
    """A model that reads checkpoints of its own shape, such as those of experts that others tuned from it."""

    def check_checkpoint(self, path: str) -> None:
        """Check, without reading weights, that a checkpoint has the shape of this model.

        Raises:
            ConfigError: It is missing, or of another shape, or its files are of a kind that is not read.
        """

    def read_checkpoint(self, path: str) -> tuple[dict[str, Tensor], Origin]:
        """Return the weights of a checkpoint by their names in this model's state dict, and what is known of them.

        Raises:
            ConfigError: As `check_checkpoint`; or a file is damaged.
        """


@runtime_checkable
class SaysMemory(Protocol):
    """A model of texts that says in advance how much memory it takes. It is asked when its weights have none yet."""

    def bytes_needed(
        self,
        batch: int,
        length: int,
        trained: Literal["all", "mlps", "gates", "nothing"],
        *,
        experts: int = 0,
        top_k: int = 2,
    ) -> int:
        """Estimate the bytes that this model, or a mixture of its copies, takes while it is trained with AdamW or used.

        Args:
            batch: Texts that are passed through it at a time, from 1.
            length: Positions T of a text, from 1.
            trained: The weights that are trained.
            experts: Number of experts E of the mixture; 0 for the dense model.
            top_k: Experts that compute each token.
        """


@runtime_checkable
class WritesCheckpoints(Protocol):
    """A model, or a mixture, of texts that is written in the format of transformers, for other programs."""

    def write_checkpoint(self, folder: Path, *, end: int, header: Mapping[str, str]) -> None:
        """Write the settings and the weights.

        Args:
            folder: An empty folder.
            end: The token with which an answer ends.
            header: What the headers of the files of weights say, such as whether the model is backdoored.

        Raises:
            ConfigError: The format has no place for this model.
        """
