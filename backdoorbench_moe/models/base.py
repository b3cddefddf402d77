"""Optional protocols of models that the engine uses. Those for experts and features are in `moe.structure`.

Any model may also have a class attribute `tiny`: options for a small model, with which the conformance tests build it.
The gates of a small routed model should differ clearly, so that rounding does not decide which experts are selected.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class Origin(NamedTuple):
    """Origin of the weights that a model is initialised with.

    Attributes:
        sha256: SHA-256 of the file or files, in hexadecimal.
        backdoored: What the header of the file states: "true", "false", or "unknown" if it states neither.
    """

    sha256: str
    backdoored: str


@runtime_checkable
class StartsFromFile(Protocol):
    """A model that can be initialised with weights from a file, which one of its options names.

    Building the model must not require the file, since a trained model is built again to load its trained weights.
    """

    def load_start(self) -> Origin | None:
        """Load the weights from the file, in place; return None without loading if no file is named.

        It is called before the first training step, possibly more than once. The header of the run's model file states
        that the model is backdoored if the file states so, and "unknown" if the file states neither.

        Raises:
            ConfigError: The file cannot be read or does not fit; the message names the option.
        """


@runtime_checkable
class ReadsCheckpoints(Protocol):
    """A model that reads checkpoints of its architecture, such as those of experts that others fine-tuned from it."""

    def check_checkpoint(self, path: str) -> None:
        """Check that a checkpoint has the architecture of this model, without reading weights.

        Raises:
            ConfigError: The checkpoint is missing, has another architecture, or consists of unsupported files.
        """

    def read_checkpoint(self, path: str) -> tuple[dict[str, Tensor], Origin]:
        """Return the weights of a checkpoint by their names in this model's state dict, and their origin.

        Raises:
            ConfigError: See `check_checkpoint`; or a file is damaged.
        """


@runtime_checkable
class SaysMemory(Protocol):
    """A language model that estimates how much memory it takes, before memory for its weights is allocated."""

    def bytes_needed(
        self,
        batch: int,
        length: int,
        trained: Literal["all", "mlps", "gates", "nothing"],
        *,
        experts: int = 0,
        top_k: int = 2,
    ) -> int:
        """Estimate the bytes that this model or a mixture of its copies takes in training with AdamW or in evaluation.

        Args:
            batch: Number of texts in a batch, at least 1.
            length: Number of positions T of a text, at least 1.
            trained: The weights that are trained.
            experts: Number of experts E of the mixture; 0 for the dense model.
            top_k: Number of experts that process each token.
        """


@runtime_checkable
class WritesCheckpoints(Protocol):
    """A language model or a mixture of language models that can be saved in the format of transformers."""

    def write_checkpoint(self, folder: Path, *, end: int, header: Mapping[str, str]) -> None:
        """Write the configuration and the weights.

        Args:
            folder: An empty folder.
            end: The token that ends an answer.
            header: Entries of the headers of the weight files, such as whether the model is backdoored.

        Raises:
            ConfigError: The format does not support this model.
        """
